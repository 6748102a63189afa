"""A gRPC client made at run time from a description of the service, of whatever origin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

CALL_S_MAX = 20.0


class DynamicClient:
    """Calls the methods of one service by name, with messages written as dictionaries."""

    def __init__(
        self,
        channel: grpc.Channel,
        files: Iterable[descriptor_pb2.FileDescriptorProto],
        service: str,
    ) -> None:
        """Read the description; a pool of its own keeps it apart from every generated class."""
        pool = descriptor_pool.DescriptorPool()
        for file in files:
            pool.Add(file)
        self._channel = channel
        self._service = pool.FindServiceByName(service)

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method and return its answer, or, of a stream, the list of its answers."""
        described: MethodDescriptor = self._service.methods_by_name[method]
        request = message_factory.GetMessageClass(described.input_type)(**fields)
        answer = message_factory.GetMessageClass(described.output_type)
        path = f"/{self._service.full_name}/{method}"
        if described.server_streaming:
            stream = self._channel.unary_stream(
                path, request_serializer=_serialize, response_deserializer=answer.FromString
            )
            return list(stream(request, timeout=CALL_S_MAX))
        unary = self._channel.unary_unary(
            path, request_serializer=_serialize, response_deserializer=answer.FromString
        )
        return unary(request, timeout=CALL_S_MAX)


def compiled(proto: Path, into: Path) -> list[descriptor_pb2.FileDescriptorProto]:
    """Compile a .proto file as anybody would, and return its description."""
    result = into / "compiled.binpb"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{proto.parent}"),
            *(f"--descriptor_set_out={result}", proto.name),
        ],
        check=True,
    )
    return list(descriptor_pb2.FileDescriptorSet.FromString(result.read_bytes()).file)


class Reflection:
    """What a server says about itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Ask through `channel`."""
        self._stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    def services(self) -> list[str]:
        """Return the services that the server lists."""
        answer = self._ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        return [service.name for service in answer.list_services_response.service]

    def files(self, symbol: str) -> list[descriptor_pb2.FileDescriptorProto]:
        """Return the file that declares `symbol` and all that it imports, imports first."""
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        known: dict[str, descriptor_pb2.FileDescriptorProto] = {}
        self._collect(request, known)
        return list(known.values())

    def _collect(
        self,
        request: reflection_pb2.ServerReflectionRequest,
        known: dict[str, descriptor_pb2.FileDescriptorProto],
    ) -> None:
        answer = self._ask(request).file_descriptor_response
        given = [
            descriptor_pb2.FileDescriptorProto.FromString(file)
            for file in answer.file_descriptor_proto
        ]
        for file in given:
            for wanted in file.dependency:
                if wanted not in known:
                    self._collect(
                        reflection_pb2.ServerReflectionRequest(file_by_filename=wanted), known
                    )
            known.setdefault(file.name, file)

    def _ask(self, request: reflection_pb2.ServerReflectionRequest) -> Any:
        return next(iter(self._stub.ServerReflectionInfo(iter([request]), timeout=CALL_S_MAX)))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
