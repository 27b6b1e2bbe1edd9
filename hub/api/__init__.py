"""The hub's own API, `/api/loractl/v1`: what the Hugging Face protocol lacks. Translates, and decides nothing."""
