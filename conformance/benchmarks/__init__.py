"""How fast and how large a port's layers are, beside their base layer and PEFT's: measured, not judged."""
