"""What takes the place of wire, Redis, vLLM and worker processes where a whole run lives in one
process.
"""
