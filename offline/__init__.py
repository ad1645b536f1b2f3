"""From preference pairs to steering vectors, with PyTorch and transformers; surface: `grains`."""
