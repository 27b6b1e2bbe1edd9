"""The registry: repos, versions and channels of adapters, spoken in the Hugging Face Hub protocol.

Refuses to know models: it reads adapter files through `loractl.adapters` and never imports torch.
"""
