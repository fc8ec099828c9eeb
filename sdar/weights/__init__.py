"""Policy versions as files: published, checked, read, kept while in use."""
