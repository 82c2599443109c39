"""Self-contained diffusers pipelines, copied into exports that no stock class can run. They import torch and diffusers only."""
