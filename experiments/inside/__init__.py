"""Looks at what the experts of finished models learned; nothing is trained here."""
