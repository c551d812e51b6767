"""`python -m steps.bench`: training stages and self-chat, each checked against its naive form and timed beside it."""
