"""vadit: a performance-engineered distributed trainer for VA-VAE and LightningDiT."""

__version__ = "0.1.0"
