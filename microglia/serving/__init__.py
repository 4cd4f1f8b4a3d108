"""An OpenAI-compatible server for a pruned model: HTTP on an event loop, the model on one thread of its own.

    app.py → admission.py → queue.py (worker thread) → write.py (the model)
       ↑ answers.py ←────── events, through each request's own queue ──────┘

Nothing here is imported before it is needed: the web libraries come with `pip install 'microglia[serve]'`.
"""
