"""The engine over HTTP: OpenAI's and Ollama's interfaces, health, metrics, and a page that says what is here."""
