"""The registry's schema, step by step; each step is one file that is never changed again."""
