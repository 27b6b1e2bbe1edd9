"""The rules: repos, commits, versions, channels, tokens, uploads. Knows the database and the blobs, no HTTP."""
