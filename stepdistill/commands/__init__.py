"""The commands, by families; each is a few lines over the library. `stepdistill.cli` puts them together."""
