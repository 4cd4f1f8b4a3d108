"""Pretrained models known by name, GGUF files, and the cache in which both become folders of safetensors."""
