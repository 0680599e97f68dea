"""What only asyncio needs: blocks and readers of tasks, and waiting without blocking the loop."""
