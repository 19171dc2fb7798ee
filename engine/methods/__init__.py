"""Compression methods, one a file in the folder of its family. `registry` finds them; `catalogue` describes them without torch."""
