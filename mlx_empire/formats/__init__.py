"""Model folders of other tools, in and out: Hugging Face's, mlx-lm's and PEFT's.

Only safetensors and JSON are read or written; code in a model folder is never run. Nothing here knows the engine.
"""
