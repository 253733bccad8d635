"""`/train`: whom the gate lets through queues trainings, looks at them and cancels them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from moe_dist.serve.errors import Refused
from moe_dist.serve.gate import Asked
from moe_dist.serve.schema import ERROR_AS_JSON, TrainRequest
from moe_dist.serve.training import Status, TrainingQueue


class TrainingCard(BaseModel):
    """A training. Times are seconds since 1970; `position`: how many begin before it; step and loss as logged last."""

    id: str
    object: Literal["training"]
    status: Status
    position: int | None
    output_dir: str
    created_at: int
    started_at: int | None
    finished_at: int | None
    exit_code: int | None
    step: int | None
    loss: float | None


class TrainingList(BaseModel):
    object: Literal["list"]
    data: list[TrainingCard]


def train_routes(trainings: TrainingQueue | None) -> APIRouter:
    """Without `trainings` each says how they are switched on."""
    router = APIRouter(prefix="/train")

    def queue() -> TrainingQueue:
        if trainings is None:
            raise Refused(404, "this server trains nothing: it was started without --train-dir", "training_is_off")
        return trainings

    @router.post("", summary="Queue a training on this machine", response_model=TrainingCard, status_code=202)
    async def train(request: Request, body: TrainRequest) -> dict[str, Any]:
        asked: Asked = request.scope["asked"]
        asked.said = {"config": body.config, "overrides": body.overrides}
        added = await queue().add(asked.client.name, body.config, body.overrides)
        asked.training = added.id
        return queue().card(added)

    @router.get("", summary="All trainings, the newest first", response_model=TrainingList)
    async def trainings_so_far() -> dict[str, Any]:
        return {"object": "list", "data": queue().cards()}

    @router.get("/{name}", summary="How one is getting on", response_model=TrainingCard)
    async def training(name: str) -> dict[str, Any]:
        return queue().card(queue().get(name))

    @router.get(
        "/{name}/log",
        summary="The last lines that it has printed",
        response_class=PlainTextResponse,
        responses=ERROR_AS_JSON,
    )
    async def log(name: str, lines: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        return PlainTextResponse(queue().log(queue().get(name), lines))

    @router.post("/{name}/cancel", summary="Let it save and end, or not begin", response_model=TrainingCard)
    async def cancel(request: Request, name: str) -> dict[str, Any]:
        cancelled = queue().cancel(name)
        request.scope["asked"].training = cancelled.id
        return queue().card(cancelled)

    return router
