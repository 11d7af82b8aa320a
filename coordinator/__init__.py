"""The coordinator: plans, signs job tickets, meters and answers OpenAI clients. It never sees a tensor."""
