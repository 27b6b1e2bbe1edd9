"""The Hugging Face Hub protocol, route by route. Translates between wire and registry, and decides nothing."""
