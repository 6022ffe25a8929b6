"""A small GPT trained with AdamW, Muon and NorMuon: `python -m examples.train_gpt --help`."""
