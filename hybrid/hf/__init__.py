"""The model as transformers knows it: one configuration and one modelling file, which every saved folder carries."""
