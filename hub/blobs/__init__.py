"""Where the bytes are: content-addressed blobs in a folder or an S3 store. Knows digests, never people or repos."""
