"""Real models: what the course's ideas need when the base is a transformers checkpoint. transformers is an extra; nothing here is imported by minilora."""
