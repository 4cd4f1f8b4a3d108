"""An OpenAI-compatible server for a pruned model: HTTP on an event loop, the model on one thread of its own.

    app.py → admission.py → worker.py (queue, the model's thread) → model.py (the pruned model)
       ↑ answers.py ←────── events, through a queue for each request ──────────┘ rows.py, sampling.py

Nothing here is imported before it is needed: the web libraries come with `pip install 'microglia[serve]'`.
"""
