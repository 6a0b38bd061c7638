"""A function of pydantic models. Celery 5.5 wants its annotations to be the classes themselves."""

from pydantic import BaseModel

from durable import step


class Order(BaseModel):
    sku: str
    count: int


class Receipt(BaseModel):
    total: int


@step
def price(count: int) -> int:
    return 10 * count


def order(order: Order) -> Receipt:
    return Receipt(total=price(order.count))
