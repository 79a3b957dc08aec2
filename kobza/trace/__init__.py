"""One prompt through a model, for people to look at: where each head looks, what each layer would say, what comes next."""
