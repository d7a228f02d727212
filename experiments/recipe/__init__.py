"""The training recipe of a scale: what each model of table 1 likes."""
