"""Policy versions as files: published, checked, read, and kept while somebody uses them."""
