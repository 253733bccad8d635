"""Who watches ranks: their process, their heartbeat, their last words, and how they ended."""
