"""The properties M1-M11 that hold for every causal language model, whatever its weights: no reference is needed to check them."""
