"""What ``tools/gpu_check.py`` compares, part by part."""
