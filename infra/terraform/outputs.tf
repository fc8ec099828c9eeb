output "kubeconfig_command" {
  description = "Run this to give kubectl and helm the cluster."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}

output "cluster_name" {
  description = "Name of the EKS cluster."
  value       = aws_eks_cluster.this.name
}

output "region" {
  description = "Region of all of it."
  value       = var.region
}

output "namespace" {
  description = "Namespace whose releases may reach the weights."
  value       = var.namespace
}

output "registry" {
  description = "Where the images go: REGISTRY/sdar-gateway:TAG and so on."
  value       = local.registry
}

output "weights_url" {
  description = "Weight store of the releases."
  value       = local.weights_url
}

output "karpenter_values" {
  description = "Values of Karpenter's chart."
  value = yamlencode({
    serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = aws_iam_role.service_account["karpenter"].arn } }
    settings       = { clusterName = aws_eks_cluster.this.name, interruptionQueue = aws_sqs_queue.interruption.name }
    nodeSelector   = { "sdar.dev/pool" = "system" }
    controller     = { resources = { requests = { cpu = "250m", memory = "512Mi" }, limits = { memory = "1Gi" } } }
  })
}

output "cluster_manifests" {
  description = "Node pools, storage class and namespace, for `kubectl apply`, once Karpenter runs."
  value       = join("---\n", [for manifest in concat(local.storage_manifests, local.node_class_manifests, local.node_pool_manifests) : yamlencode(manifest)])
}

output "helm_values" {
  description = "What helm/values-eks.yaml cannot know: give it to `helm install` as a second file."
  value = yamlencode({
    image = { registry = local.registry }
    storage = merge(
      { weightsUrl = local.weights_url },
      { for system in aws_fsx_lustre_file_system.checkpoints : "existingClaim" => "checkpoints" },
    )
    learner = { serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = aws_iam_role.service_account["weights-writer"].arn } } }
    rollout = { serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = aws_iam_role.service_account["weights-reader"].arn } } }
    teacher = { serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = aws_iam_role.service_account["weights-reader"].arn } } }
  })
}
