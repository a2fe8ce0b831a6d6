"""Runs as a service over HTTP, in the format of OpenAI's API."""
