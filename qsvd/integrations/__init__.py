"""Other libraries' models with these layers: each module here imports the library that it is about."""
