# Weights in one bucket, checkpoints on a volume: a gp3 volume of the learner alone, or FSx for Lustre when it spans several nodes.

locals {
  weights_prefix = "weights"
  weights_url    = "s3://${aws_s3_bucket.weights.bucket}/${local.weights_prefix}"
}

resource "aws_s3_bucket" "weights" {
  bucket        = "${var.name}-weights-${local.account_id}-${var.region}"
  force_destroy = var.delete_weights_on_destroy
}

resource "aws_s3_bucket_public_access_block" "weights" {
  bucket = aws_s3_bucket.weights.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "weights" {
  bucket = aws_s3_bucket.weights.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "weights" {
  bucket = aws_s3_bucket.weights.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

# No versioning: versions of weights never change, and old ones that the learner deletes would go on being billed.
resource "aws_s3_bucket_lifecycle_configuration" "weights" {
  bucket = aws_s3_bucket.weights.id

  rule {
    id     = "incomplete-uploads"
    status = "Enabled"
    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

resource "aws_s3_bucket_policy" "weights" {
  bucket = aws_s3_bucket.weights.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OnlyTls"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.weights.arn, "${aws_s3_bucket.weights.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })

  depends_on = [aws_s3_bucket_public_access_block.weights]
}

resource "aws_iam_role_policy" "weights" {
  for_each = {
    weights-reader = ["s3:GetObject"]
    weights-writer = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
  }

  name = "weights"
  role = aws_iam_role.service_account[each.key].name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid      = "Objects"
        Effect   = "Allow"
        Action   = each.value
        Resource = "${aws_s3_bucket.weights.arn}/${local.weights_prefix}/*"
      },
      {
        Sid       = "List"
        Effect    = "Allow"
        Action    = "s3:ListBucket"
        Resource  = aws_s3_bucket.weights.arn
        Condition = { StringLike = { "s3:prefix" = "${local.weights_prefix}/*" } }
      },
    ]
  })
}

resource "aws_security_group" "lustre" {
  count = var.lustre_gib > 0 ? 1 : 0

  name        = "${var.name}-lustre"
  description = "FSx for Lustre, from the nodes of the cluster"
  vpc_id      = aws_vpc.this.id
}

resource "aws_vpc_security_group_ingress_rule" "lustre" {
  for_each = var.lustre_gib > 0 ? {
    nodes-988   = { from = 988, to = 988, source = local.cluster_security_group }
    nodes-1018  = { from = 1018, to = 1023, source = local.cluster_security_group }
    itself-988  = { from = 988, to = 988, source = aws_security_group.lustre[0].id }
    itself-1018 = { from = 1018, to = 1023, source = aws_security_group.lustre[0].id }
  } : {}

  security_group_id            = aws_security_group.lustre[0].id
  referenced_security_group_id = each.value.source
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_egress_rule" "lustre" {
  for_each = var.lustre_gib > 0 ? {
    nodes  = local.cluster_security_group
    itself = aws_security_group.lustre[0].id
  } : {}

  security_group_id            = aws_security_group.lustre[0].id
  referenced_security_group_id = each.value
  ip_protocol                  = "-1"
}

resource "aws_fsx_lustre_file_system" "checkpoints" {
  count = var.lustre_gib > 0 ? 1 : 0

  deployment_type                 = "PERSISTENT_2"
  storage_type                    = "SSD"
  storage_capacity                = var.lustre_gib
  per_unit_storage_throughput     = 250
  file_system_type_version        = "2.15"
  data_compression_type           = "LZ4"
  automatic_backup_retention_days = 0
  subnet_ids                      = [aws_subnet.private[local.learner_zone].id]
  security_group_ids              = [aws_security_group.lustre[0].id]
  tags                            = { Name = "${var.name}-checkpoints" }
}

locals {
  storage_manifests = concat(
    [
      {
        apiVersion           = "storage.k8s.io/v1"
        kind                 = "StorageClass"
        metadata             = { name = "sdar-gp3" }
        provisioner          = "ebs.csi.aws.com"
        reclaimPolicy        = "Delete"
        volumeBindingMode    = "WaitForFirstConsumer"
        allowVolumeExpansion = true
        parameters           = { type = "gp3", encrypted = "true", throughput = "500" }
      },
      {
        apiVersion = "v1"
        kind       = "Namespace"
        metadata   = { name = var.namespace, labels = { "pod-security.kubernetes.io/enforce" = "restricted" } }
      },
    ],
    [for system in aws_fsx_lustre_file_system.checkpoints : {
      apiVersion = "v1"
      kind       = "PersistentVolume"
      metadata   = { name = "${var.name}-checkpoints" }
      spec = {
        capacity                      = { storage = "${var.lustre_gib}Gi" }
        accessModes                   = ["ReadWriteMany"]
        persistentVolumeReclaimPolicy = "Retain"
        storageClassName              = ""
        mountOptions                  = ["flock"]
        claimRef                      = { namespace = var.namespace, name = "checkpoints" }
        csi = {
          driver           = "fsx.csi.aws.com"
          volumeHandle     = system.id
          volumeAttributes = { dnsname = system.dns_name, mountname = system.mount_name }
        }
      }
    }],
    [for system in aws_fsx_lustre_file_system.checkpoints : {
      apiVersion = "v1"
      kind       = "PersistentVolumeClaim"
      metadata   = { namespace = var.namespace, name = "checkpoints" }
      spec = {
        accessModes      = ["ReadWriteMany"]
        storageClassName = ""
        volumeName       = "${var.name}-checkpoints"
        resources        = { requests = { storage = "${var.lustre_gib}Gi" } }
      }
    }],
  )
}
