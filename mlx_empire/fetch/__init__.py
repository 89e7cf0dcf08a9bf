"""What brings a model's folder from the Hugging Face Hub, whole and checked."""
