"""What a model is made of, counted without building it: shapes, parameters, FLOPs, bytes."""
