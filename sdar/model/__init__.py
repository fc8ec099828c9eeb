"""A model directory: its files, its chat template, its weights in torch."""
