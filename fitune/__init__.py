"""fitune: fine-tune Llama 3, 70B above all, on the GPUs you own."""

__version__ = "0.1.0"
