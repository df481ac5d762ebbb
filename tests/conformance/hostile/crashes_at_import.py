"""A port that cannot even be imported: its process aborts."""

import os

print("this build needs another processor")
os.abort()
