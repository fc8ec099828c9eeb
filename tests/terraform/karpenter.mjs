// Reads manifests (JSON, an array) from stdin and prints what the validators of Karpenter's own types say against them, a line each.
import fs from "node:fs";
import { EC2NodeClass } from "@kubernetes-models/karpenter/karpenter.k8s.aws/v1/EC2NodeClass";
import { NodePool } from "@kubernetes-models/karpenter/karpenter.sh/v1/NodePool";

const kinds = { EC2NodeClass, NodePool };
for (const manifest of JSON.parse(fs.readFileSync(0, "utf8"))) {
  try {
    new kinds[manifest.kind](manifest).validate();
  } catch (error) {
    console.log(`${manifest.kind} ${manifest.metadata.name}: ${error.message}`);
  }
}
