"""How the bundled model was made: text, tokenizer, training, export."""
