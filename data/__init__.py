"""Published forms -> one prepared form. files.py reads formats, prepared.py keeps what is made."""
