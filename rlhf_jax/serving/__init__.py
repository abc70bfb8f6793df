"""Model directories behind the chat and completion routes of the OpenAI protocol."""
