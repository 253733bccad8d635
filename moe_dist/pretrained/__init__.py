"""In from a Hugging Face folder, and out as one."""
