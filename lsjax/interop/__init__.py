"""Llamas from elsewhere and back: Hugging Face folders in and out, GGUF files in."""
