"""Faster forms of the model's parts, put in their place by surgery; each has its plain twin in model.py, which its test uses."""
