"""FFSD (Li et al., arXiv 2103.14473): students learn from each other, and their fusion teaches a leader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.methods.attention import Decoder, attention, distance, diversity, with_shift
from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.checks import check_maps, check_no_exits, check_num_peers
from wml_ray.methods.feature_settings import FfsdConfig
from wml_ray.methods.ffl import classifier, separable
from wml_ray.methods.losses import average_ensemble, cross_entropies, divergences, divergences_from_others
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class Ffsd(Method):
    """Terms of logits, of maps and of decoders; a, b are the students, L is the leader, r the ramp.

    - logits: sum_i CE(z_i, y) + CE(z_f, y) + w [sum_a mean_{b != a} KL_T(z_a <- z_b) + KL_T(z_f <- mean_a z_a) +
      KL_T(z_L <- z_f)], with z_f the logits of the students' fused last maps.
    - diversity, for each student but the first: the distance of its attention from the shifted one of the student
      before it, and those of its earlier maps' attention from that of its decoder.
    - maps: the distance of the leader's attention from that of the fused map, that of its expanded map from that of all
      students' maps, and those of its earlier maps' from that of its decoder, which reads the fused map.
    - decoders: how far each is from giving the earlier maps of its own peer.

    All that teaches is detached, the maps that are fused and decoded too: students learn nothing from the fusion,
    nobody learns from the leader, and decoders learn from their own term alone. The decoder of a student reads that
    student's last map with the shift of the attention of the student before it.
    """

    selects: ClassVar[str] = "leader"
    settings: FfsdConfig

    def __init__(self, tree: PeerTree, settings: FfsdConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        check_num_peers(tree, "ffsd", 3, "a leader and two students")
        check_no_exits(tree, "ffsd", "as it fuses the last maps of all students, which are of one size")
        self.leader = tree.num_peers - 1 if settings.leader is None else settings.leader
        if self.leader >= tree.num_peers:
            raise UserError(f"ffsd.leader = {self.leader}: the peers are 0 to {tree.num_peers - 1}, or null the last")
        self.students = [peer for peer in range(tree.num_peers) if peer != self.leader]
        maps = self.shapes(tree, spec).maps
        self.last = len(maps) - 1
        self.earlier = range(self.last - 1, 0, -1)  # the stages that are decoded; the first is only a stem
        for stage in (self.last, *self.earlier):
            check_maps(maps[stage] if maps else [], "ffsd")
        self.fused_copies = sorted({tree.copy_of(self.last, peer) for peer in self.students})
        shapes = {
            peer: [maps[stage][tree.copy_of(stage, peer)].shape[1:] for stage in (self.last, *self.earlier)]
            for peer in (*self.students[1:], self.leader)
        }
        width, joined = shapes[self.leader][0][0], sum(maps[self.last][copy].shape[1] for copy in self.fused_copies)
        self.fusion, self.expansion = separable(joined, width), separable(width, joined)
        self.classifier = classifier(width, spec.num_classes)
        self.decoders = nn.ModuleDict({str(peer): Decoder(shapes[peer]) for peer in shapes})

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits of the peers and of the fusion; in training also maps, and those of the decoders.

        `map<s>_<c>` is the map of copy c of stage s, `decoded<i>_<s>` what the decoder of peer i makes of that peer's
        own last map, `target<i>_<s>` what it teaches.
        """
        features = self.tree.features(inputs)
        fused_map = self.fusion(self._joined([copy.detach() for copy in features.maps[self.last]]))
        outputs = {"logits_MBK": features.logits_MBK, "fused_BK": self.classifier(fused_map)}
        if not self.training:
            return outputs
        for stage in (self.last, *self.earlier):
            outputs |= {f"map{stage}_{copy}": tensor for copy, tensor in enumerate(features.maps[stage])}
        outputs |= {"fused_map": fused_map, "expanded_map": self.expansion(self._map(outputs, self.last, self.leader))}
        for peer, read in self._read_by_decoders(outputs).items():
            decoder = self.decoders[str(peer)]
            with torch.no_grad():  # before the step on its own map changes the running statistics
                taught = decoder(read, frozen=True)
            decoded = decoder(self._map(outputs, self.last, peer).detach())
            for stage, target_map, decoded_map in zip(self.earlier, taught, decoded, strict=True):
                outputs[f"target{peer}_{stage}"], outputs[f"decoded{peer}_{stage}"] = target_map, decoded_map
        return outputs

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, the divergences, and the terms of the maps, whose weights rise by the ramp."""
        logits_MBK, fused_BK, settings = outputs["logits_MBK"], outputs["fused_BK"], self.settings
        students_PBK, leader_1BK = logits_MBK[self.students], logits_MBK[self.leader].unsqueeze(0)
        from_mean = divergences(fused_BK.unsqueeze(0), average_ensemble(students_PBK.detach()), settings.temperature)
        from_fused = divergences(leader_1BK, fused_BK.detach(), settings.temperature)
        ramp = context.ramp(settings.ramp)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "fused_labels": F.cross_entropy(fused_BK, targets_B),
            "mutual": settings.weight * divergences_from_others(students_PBK, settings.temperature).sum(),
            "fused": settings.weight * from_mean.sum(),
            "leader": settings.weight * from_fused.sum(),
            "diversity": ramp * settings.diversity_weight * self._diversity(outputs),
            "maps": ramp * settings.map_weight * self._leader_maps(outputs),
            "decoders": ramp * settings.decoder_weight * self._decoder_errors(outputs),
        }

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The leader, and the classifier of the fused maps."""
        return {"leader": outputs["logits_MBK"][self.leader], "fused": outputs["fused_BK"]}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("leader", "fused")

    def _map(self, outputs: Outputs, stage: int, peer: int) -> Tensor:
        return outputs[f"map{stage}_{self.tree.copy_of(stage, peer)}"]

    def _joined(self, copies: Sequence[Tensor]) -> Tensor:
        """The students' last maps side by side; a map that students share is there once."""
        return torch.cat([copies[copy] for copy in self.fused_copies], dim=1)

    def _read_by_decoders(self, outputs: Outputs) -> dict[int, Tensor]:
        """What each peer's decoder reads when it teaches, detached."""
        read = {self.leader: outputs["fused_map"].detach()}
        for before, student in zip(self.students, self.students[1:], strict=False):
            other_BN = attention(self._map(outputs, self.last, before).detach())
            read[student] = with_shift(self._map(outputs, self.last, student).detach(), other_BN)
        return read

    def _diversity(self, outputs: Outputs) -> Tensor:
        total = outputs["logits_MBK"].new_zeros(())
        for before, student in zip(self.students, self.students[1:], strict=False):
            own, other = (attention(self._map(outputs, self.last, peer)) for peer in (student, before))
            total = total + diversity(own, other.detach()) + self._from_decoder(outputs, student)
        return total

    def _leader_maps(self, outputs: Outputs) -> Tensor:
        last = range(self.tree.sharing[self.last])
        joined = self._joined([outputs[f"map{self.last}_{copy}"].detach() for copy in last])
        own = attention(self._map(outputs, self.last, self.leader))
        total = distance(own, attention(outputs["fused_map"].detach()))
        total = total + distance(attention(outputs["expanded_map"]), attention(joined))
        return total + self._from_decoder(outputs, self.leader)

    def _from_decoder(self, outputs: Outputs, peer: int) -> Tensor:
        """Distances of the attention of a peer's earlier maps from that of its decoder."""
        total = outputs["logits_MBK"].new_zeros(())
        for stage in self.earlier:
            taught = attention(outputs[f"target{peer}_{stage}"].detach())
            total = total + distance(attention(self._map(outputs, stage, peer)), taught)
        return total

    def _decoder_errors(self, outputs: Outputs) -> Tensor:
        """Distances of decoded maps, and of their attention, from the maps of the decoders' own peers."""
        total = outputs["logits_MBK"].new_zeros(())
        for peer in map(int, self.decoders):
            for stage in self.earlier:
                decoded, own = outputs[f"decoded{peer}_{stage}"], self._map(outputs, stage, peer).detach()
                total = total + distance(decoded, own) + distance(attention(decoded), attention(own))
        return total
