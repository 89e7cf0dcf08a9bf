"""The audit of what a recipe's techniques change, against training with everything in float32."""
