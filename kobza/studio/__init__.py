"""A local web page: play with models, look inside them, watch them train. Rooms on one shell, each given its sources."""
