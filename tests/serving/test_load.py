"""Sixty-four clients at once, some of which hang up: every answer is the one that its prompt gets alone."""

import asyncio
import contextlib

import openai

from microglia.tasks import get_task
from tests.serving.served import NAME, PATIENCE, alone, running, tiny_pruned

CLIENTS = 64
KINDS = ({}, {"pruning": False}, {"keep_ratio": 0.6})


def questions():
    problems = get_task("arithmetic").load("test", limit=CLIENTS // 2)
    return [problem.question[:60] for problem in problems] + [
        f"{n} + {n} = " * (1 + n % 4) for n in range(CLIENTS // 2)
    ]


async def ask(url, index, question):
    """One client: what it got, and None when it hung up."""
    body = {"model": NAME, "prompt": question, "max_tokens": 4 + index % 9, "extra_body": KINDS[index % len(KINDS)]}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        if index % 8 == 7:  # hangs up before the answer
            with contextlib.suppress(TimeoutError, openai.APIConnectionError):
                await asyncio.wait_for(client.completions.create(**{**body, "max_tokens": 200}), 0.05 * (index % 5))
            return None
        if index % 2:
            stream = await client.completions.create(**body, stream=True)
            if index % 16 == 3:  # hangs up after the first piece
                async for _ in stream:
                    break
                await stream.close()
                return None
            return "".join([chunk.choices[0].text async for chunk in stream])
        if index % 4 == 2:
            del body["prompt"]
            chat = await client.chat.completions.create(**body, messages=[{"role": "user", "content": question}])
            return chat.choices[0].message.content
        return (await client.completions.create(**body)).choices[0].text


def test_no_answer_is_mixed_up_or_lost():
    model, texts = tiny_pruned(), questions()
    prompts = [model.template.format(question=q) if index % 4 == 2 else q for index, q in enumerate(texts)]
    truths = [
        alone(prompt, 4 + index % 9, **KINDS[index % len(KINDS)]).texts[0] for index, prompt in enumerate(prompts)
    ]
    assert len(set(truths)) > CLIENTS // 2  # a mix-up would show

    async def everybody(url):
        return await asyncio.gather(*(ask(url, index, question) for index, question in enumerate(texts)))

    for batch_by in ("settings", "decision"):
        with running(model, max_batch=8, batch_by=batch_by) as served:
            answers = asyncio.run(everybody(served.url))
            stayed = [index for index, answer in enumerate(answers) if answer is not None]
            assert len(stayed) == CLIENTS - CLIENTS // 8 - CLIENTS // 16
            assert {index: answers[index] for index in stayed} == {index: truths[index] for index in stayed}
            worker = served.app.state.service.worker
            for _ in range(PATIENCE * 20):
                if not (worker.waiting or worker.running):
                    break
                served.thread.join(0.05)
            assert (worker.waiting, worker.running) == ([], [])
            assert served.metric("microglia_batch_rows_count") < CLIENTS  # batches, not one by one
            assert worker.alive
